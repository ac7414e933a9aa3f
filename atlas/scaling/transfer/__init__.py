"""Transfer measured without the joint law: bilingual scores, their completion, the capacity law."""
