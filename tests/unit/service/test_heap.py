"""mallopt(3), where there is one."""

from __future__ import annotations

import ctypes
import platform

import pytest

from gateway.service import heap


def test_glibc_takes_the_settings() -> None:
    assert heap.keep_heap() is (platform.libc_ver()[0] == "glibc")


def test_what_the_environment_says_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            asked.append(parameter)
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    assert heap.keep_heap()
    assert asked == [-1, -3]


def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not heap.keep_heap()
