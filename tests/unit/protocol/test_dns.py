"""DNS messages against dnspython, hostile compression, and any bytes."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import Any

import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.reversename
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import dns as codec
from gateway.protocol.dns import Answer, Mx, Record, Soa, parse, query, reverse_name
from gateway.protocol.errors import LocalError, PeerError

LABELS = st.binary(min_size=1, max_size=12) | st.sampled_from([b"a.b", b"\\", b"mail", b"example"])
NAMES = st.lists(LABELS, max_size=5).map(lambda labels: dns.name.Name([*labels, b""]))
HOSTS = st.from_regex(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,20}){0,8}", fullmatch=True)
TTLS = st.integers(0, 2**31 - 1)
U32 = st.integers(0, 2**32 - 1)


def text(name: str) -> str:
    return "." if name == "." else name + "."


@given(HOSTS, st.booleans(), st.integers(0, 65535), st.sampled_from([codec.A, codec.AAAA, codec.PTR, codec.TXT]))
def test_query_against_the_oracle(name: str, dot: bool, number: int, qtype: int) -> None:
    expected = dns.message.make_query(name + ".", dns.rdatatype.RdataType(qtype), id=number).to_wire()
    assert query(number, name + "." * dot, qtype) == expected


def test_query_of_the_root() -> None:
    assert query(1, ".", codec.SOA) == dns.message.make_query(".", "SOA", id=1).to_wire()


@pytest.mark.parametrize(
    "name",
    ["", "a..b", ".a", "a..", "a" * 64, "ä.example", "a b", "a\\.b", "a\n", "a\0b", ".".join(["a" * 63] * 4), "\udcff"],
)  # fmt: skip
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(LocalError):
        query(1, name, codec.A)


def test_the_longest_name() -> None:
    name = ".".join(["a" * 63] * 3 + ["b" * 61])
    assert query(1, name, codec.A) == dns.message.make_query(name, "A", id=1).to_wire()
    with pytest.raises(LocalError):
        query(1, name + "b", codec.A)


RDATA = st.one_of(
    st.tuples(st.just("A"), st.ip_addresses(v=4).map(str)),
    st.tuples(st.just("AAAA"), st.ip_addresses(v=6).map(str)),
    st.tuples(st.just("PTR"), NAMES.map(str)),
    st.tuples(st.just("CNAME"), NAMES.map(str)),
    st.tuples(st.just("MX"), st.tuples(st.integers(0, 65535), NAMES).map(lambda mx: f"{mx[0]} {mx[1]}")),
    st.tuples(st.just("TXT"), st.lists(st.text("ab c", max_size=255), min_size=1, max_size=3).map(
        lambda strings: " ".join(f'"{string}"' for string in strings))),
    st.tuples(st.just("SOA"), st.tuples(NAMES, NAMES, st.lists(U32.map(lambda n: min(n, 2**31 - 1)), min_size=5,
                                                               max_size=5)).map(
        lambda soa: f"{soa[0]} {soa[1]} " + " ".join(map(str, soa[2])))),
)  # fmt: skip
RECORDS = st.lists(st.tuples(NAMES, TTLS, RDATA), max_size=6)


def oracle_record(name: dns.name.Name, ttl: int, kind: str, rdata: str) -> dns.rrset.RRset:
    return dns.rrset.from_text(name, ttl, "IN", kind, rdata)


def check_data(record: Record, rdata: Any) -> None:
    """Compare with the oracle's fields; names by their labels, since both write odd bytes in their own way."""
    match record.data:
        case Mx(preference, exchange):
            assert (preference, dns.name.from_text(text(exchange))) == (rdata.preference, rdata.exchange)
        case Soa() as soa:
            assert [dns.name.from_text(text(name)) for name in soa[:2]] == [rdata.mname, rdata.rname]
            assert [*soa[2:]] == [rdata.serial, rdata.refresh, rdata.retry, rdata.expire, rdata.minimum]
        case bytes(joined):
            assert joined == b"".join(rdata.strings)
        case str(value) if record.type in (codec.A, codec.AAAA):
            assert ip_address(value) == ip_address(rdata.address)
        case str(value):
            assert dns.name.from_text(text(value)).labels == rdata.target.labels


@given(st.integers(0, 65535), NAMES, st.integers(0, 15), RECORDS)
def test_answer_against_the_oracle(
    number: int, question: dns.name.Name, rcode: int, records: list[tuple[dns.name.Name, int, tuple[str, str]]]
) -> None:
    message = dns.message.make_response(dns.message.make_query(question, "A", id=number))
    message.set_rcode(dns.rcode.Rcode(rcode))
    message.answer = [oracle_record(name, ttl, *rdata) for name, ttl, rdata in records]
    answer = parse(message.to_wire())
    assert (answer.id, answer.rcode, answer.truncated, answer.negative_ttl) == (number, rcode, False, None)
    assert (dns.name.from_text(text(answer.question[0])).labels, answer.question[1]) == (question.labels, codec.A)
    assert len(answer.records) == len(records)
    for record, rrset in zip(answer.records, message.answer, strict=True):
        assert dns.name.from_text(text(record.name)) == rrset.name
        assert (record.type, record.ttl) == (rrset.rdtype, rrset.ttl)
        check_data(record, rrset[0])


@pytest.mark.parametrize(("ttl", "minimum", "negative"), [(300, 60, 60), (60, 300, 60), (0, 5, 0)])
def test_negative_ttl(ttl: int, minimum: int, negative: int) -> None:
    message = dns.message.make_response(dns.message.make_query("gone.example.", "A", id=7))
    message.set_rcode(dns.rcode.NXDOMAIN)
    soa = f"ns.example. root.example. 1 2 3 4 {minimum}"
    message.authority = [oracle_record(dns.name.from_text("example."), ttl, "SOA", soa)]
    assert parse(message.to_wire()) == Answer(7, codec.NXDOMAIN, False, ("gone.example", codec.A), (), negative)


def test_other_types_classes_and_sections_are_passed_over() -> None:
    message = dns.message.make_response(dns.message.make_query("x.example.", "A", id=7))
    owner = dns.name.from_text("x.example.")
    message.answer = [
        oracle_record(owner, 5, "SRV", "1 2 3 y.example."),
        dns.rrset.from_text(owner, 5, "CH", "TXT", '"x"'),
        oracle_record(owner, 5, "A", "192.0.2.7"),
    ]
    message.additional = [oracle_record(owner, 5, "A", "192.0.2.8")]
    message.use_edns(0)
    assert parse(message.to_wire()).records == (Record("x.example", codec.A, 5, "192.0.2.7"),)


def test_case_is_kept_and_odd_bytes_look_odd() -> None:
    question = dns.name.Name([b"a.B", b"\\c", b"d e", b"\xff", b"f\n", b""])
    message = dns.message.make_response(dns.message.make_query(question, "PTR", id=7))
    name, qtype = parse(message.to_wire()).question
    assert (name, qtype) == ("a\\046B.\\092c.d\\032e.\\255.f\\010", codec.PTR)


def header(flags: int = 0x8180, questions: int = 0, answers: int = 0) -> bytes:
    return struct.pack("!6H", 7, flags, questions, answers, 0, 0)


def test_without_question() -> None:
    assert parse(header(0x8181)) == Answer(7, 1, False, ("", 0), (), None)


def test_truncated_records_are_not_read() -> None:
    data = header(0x8380, 1, 9) + b"\1a\0\0\1\0\1" + b"\xc0\x0c\0\1"
    assert parse(data) == Answer(7, 0, True, ("a", codec.A), (), None)


def test_a_ttl_with_the_highest_bit_is_zero() -> None:
    data = header(answers=1) + b"\1a\0\0\1\0\1\x80\0\0\1\0\4\xc0\0\2\7"
    assert parse(data).records == (Record("a", codec.A, 0, "192.0.2.7"),)


def record(kind: int, rdata: bytes, name: bytes = b"\0") -> bytes:
    return header(answers=1) + name + struct.pack("!HHIH", kind, 1, 5, len(rdata)) + rdata


@pytest.mark.parametrize(
    "data",
    [
        b"", header()[:-1], header(0x0180), header(0x8980), header(questions=2), header(questions=1), header(answers=1),
        header(questions=1) + b"\1a\0\0\1\0", header(questions=1) + b"\1a\0\0\1\0\3",
        header(questions=1) + b"\xc0\x0c\0\1\0\1", header(questions=1) + b"\1a\xc0\x0c\0\1\0\1",
        header(questions=1) + b"\xc0\x0e\1a\0\0\1\0\1", header(questions=1) + b"\xc0", header(questions=1) + b"\x40a",
        header(questions=1) + b"\x80a", header(questions=1) + b"\5abc",
        header(questions=1) + b"\1a" * 127 + b"\1a\0\0\1\0\1",
        record(codec.A, b"\xc0\0\2"), record(codec.A, b"\xc0\0\2\7\7"), record(codec.AAAA, bytes(15)),
        record(codec.A, b"\xc0\0\2\7")[:-1], record(codec.PTR, b""), record(codec.PTR, b"\1a\0\0"),
        record(codec.PTR, b"\1a"), record(codec.MX, b"\0"), record(codec.MX, b"\0\1\1a\0\0"), record(codec.MX, b""),
        record(codec.TXT, b""), record(codec.TXT, b"\2a"), record(codec.TXT, b"\1ab\1"),
        record(codec.SOA, b"\0\0" + bytes(19)), record(codec.SOA, b"\0\0" + bytes(21)), record(codec.SOA, b"\0"),
    ],
)  # fmt: skip
def test_malformed(data: bytes) -> None:
    with pytest.raises(PeerError):
        parse(data)


def test_long_chains_of_pointers_end() -> None:
    start = len(header()) + len(b"\0") + 10
    for count, allowed in ((127, True), (128, False), (8000, False)):
        # the root, pointers to what stands before each of them, and a record whose name is the last pointer
        chain = b"\0\0" + b"".join((0xC000 | start + 2 * i).to_bytes(2, "big") for i in range(count - 1))
        wire = header(answers=2) + b"\0" + struct.pack("!HHIH", 99, 1, 5, len(chain)) + chain
        name = (0xC000 | len(wire) - 2).to_bytes(2, "big")
        wire += name + struct.pack("!HHIH", codec.A, 1, 5, 4) + b"\xc0\0\2\7"
        if allowed:
            assert parse(wire).records == (Record(".", codec.A, 5, "192.0.2.7"),)
        else:
            with pytest.raises(PeerError, match="loop"):
                parse(wire)


@given(st.binary(), st.sampled_from([b"", header(), header(questions=1), header(answers=3), record(2, b"")[:-2]]))
def test_any_bytes_parse_or_are_refused(data: bytes, start: bytes) -> None:
    try:
        answer = parse(start + data)
    except PeerError:
        return
    assert answer.question[0].isascii() and answer.question[0].isprintable()


@given(st.data())
def test_a_damaged_answer_parses_or_is_refused(data: st.DataObject) -> None:
    message = dns.message.make_response(dns.message.make_query("x.example.", "MX", id=7))
    owner = dns.name.from_text("x.example.")
    message.answer = [oracle_record(owner, 5, *rdata) for rdata in (("MX", "1 mail.x.example."), ("TXT", '"abc" "d"'))]
    message.authority = [oracle_record(owner, 5, "SOA", "ns.x.example. root.example. 1 2 3 4 5")]
    wire = bytearray(message.to_wire())
    for position in data.draw(st.lists(st.integers(0, len(wire) - 1), max_size=4)):
        wire[position] = data.draw(st.integers(0, 255))
    try:
        parse(bytes(wire[: data.draw(st.integers(0, len(wire)))]))
    except PeerError:
        pass


@given(st.ip_addresses())
def test_reverse_name_against_the_oracle(ip: object) -> None:
    assert reverse_name(str(ip)) + "." == str(dns.reversename.from_address(str(ip)))


def test_reverse_name() -> None:
    assert reverse_name("::ffff:192.0.2.7") == reverse_name("192.0.2.7") == "7.2.0.192.in-addr.arpa"
    assert reverse_name("fe80::1%eth0") == reverse_name("fe80::1")
    with pytest.raises(LocalError):
        reverse_name("unix:")
