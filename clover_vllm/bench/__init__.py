"""`clover-vllm bench`: methods side by side on the same prompts, flags and process settings."""
