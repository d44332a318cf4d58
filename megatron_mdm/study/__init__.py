"""The study: many runs of many methods on many tasks, and what they say."""
