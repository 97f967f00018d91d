"""Seeing and steering the service: the admin API, the metrics listener, and where `gateway ctl` finds them."""
