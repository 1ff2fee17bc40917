"""The memory plan of full_size.py against real updates of small models."""
import pytest
from memory_plan import SMALL, measure


@pytest.mark.parametrize("name", SMALL)
def test_planned_memory_is_what_an_update_takes(name):
    planned, got = measure(*SMALL[name])
    for part in ("weights", "reference", "KV cache", "optimizer", "gradients"):
        assert planned[part] == pytest.approx(got[part], rel=0.02), part
    assert planned["update"] == pytest.approx(got["update"], rel=0.15)
