"""Opening what is packed, and saying what is damaged."""
from domain_adapt.sources.reading import decode


def test_decode():
    assert decode("€ 5".encode()) == decode("€ 5".encode("cp1252")) == decode("\ufeff€ 5".encode()) == "€ 5"
