"""What serving costs and gains: SGLang's own load generators against every kind of KV cache."""
