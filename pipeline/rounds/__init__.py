"""Rounds: the student answers, the teacher's targets for its answers are cached, the student is trained on."""
