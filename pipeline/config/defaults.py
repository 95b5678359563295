"""Defaults that several configurations share."""

DEFAULT_MAX_LENGTH = 2048
