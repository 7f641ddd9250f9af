"""The public names: sorted, all there, importable from the root."""

from __future__ import annotations

import featcache


def test_all_is_sorted_and_complete() -> None:
    assert featcache.__all__ == sorted(featcache.__all__)
    assert set(featcache.__all__) == set(featcache._HOMES)


def test_every_public_name_is_what_its_home_defines() -> None:
    for name in featcache.__all__:
        value = getattr(featcache, name)
        assert value.__name__ == name
        assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(featcache, "no_such_name")
