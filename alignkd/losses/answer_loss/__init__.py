"""Output head, cross-entropy and divergences in one function, whose scratch does not grow with the answers."""

from alignkd.losses.answer_loss.fused import AnswerTerms, answer_terms

__all__ = ["AnswerTerms", "answer_terms"]
