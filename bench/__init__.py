"""Scripts that measure: one script a question, JSON first, then the plot."""
