"""How a prompt and a response become text."""


def plain_prompt(prompt: str) -> str:
    """The prompt, a line break; the response follows as it is."""
    return prompt + "\n"
