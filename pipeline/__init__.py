"""The jobs: read samples, run stage one (cache the teacher), run stage two (distil the student), evaluate, report."""
