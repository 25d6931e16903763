"""The speedrun's model: parts that gained since GPT-2, each with a key (docs/speedrun.md)."""
