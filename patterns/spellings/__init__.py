"""The eager spellings of procedural patterns that have many: what people write, and what the fuzzer runs."""
