"""What are the kernels once compiled, and what do they read? Answered without a GPU."""
