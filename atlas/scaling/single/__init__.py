"""Laws of one loss: what a law is, the library of laws, their fit, bootstrap, comparison and influence."""
