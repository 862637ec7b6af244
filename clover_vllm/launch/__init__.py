"""Starting vLLM from outside: environment, processes, servers."""
