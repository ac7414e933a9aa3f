"""The joint fit of all languages: prior, linear system, rounds, verdicts, information, influence, draws."""
