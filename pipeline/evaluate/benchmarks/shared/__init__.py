"""What several benchmarks share: fields of official files, LLaVA's question files, matching by id, answers in normal form."""
