"""What `make demo` and `clover-vllm trees` show."""
