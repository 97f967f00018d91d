"""Speed as a ratio: nginx's mail proxy and the gateway on the same jobs, interleaved in one run."""
