"""DNS for stages: an asynchronous stub resolver."""
