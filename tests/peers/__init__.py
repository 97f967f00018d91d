"""Peers for tests: real mail programs, and scripted ones that misbehave at a chosen step."""
