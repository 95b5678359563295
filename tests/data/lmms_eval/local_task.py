"""Functions of the task ``local_questions``; its questions and pictures lie in the working folder."""

from PIL import Image


def pictures(document):
    """The pictures of a question, in RGB."""
    return [Image.open(name).convert("RGB") for name in document["images"]]


def right(document, results):
    """Whether the answer is the expected one, to the character."""
    return {"right": float(results[0] == document["answer"])}
