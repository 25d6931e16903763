"""Define the models of Karpathy's lecture, from a bigram to a GPT. See docs/lecture.md."""
