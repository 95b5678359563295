"""The sections of a run's page: each gives HTML and the figures that it shows, or says what is missing."""
