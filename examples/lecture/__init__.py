"""The models of Karpathy's lecture, from a bigram to a GPT; docs/lecture.md walks through them."""
