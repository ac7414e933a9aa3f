"""The runs table: reading and checking it, its loss curves, labels of languages, published figures."""
