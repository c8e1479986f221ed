# SPDX-License-Identifier: Apache-2.0
"""The table of GPUs one does not have."""

from __future__ import annotations

import pytest

from headinfer.budget import GIB
from headinfer.errors import InputError
from headinfer.machines import MACHINES, machine_named


@pytest.mark.parametrize("name", ["RTX 4090", "rtx-4090", "NVIDIA GeForce RTX 4090", " rtx  4090 "])
def test_names_are_found_however_they_are_written(name):
    machine = machine_named(name)
    assert machine.name == "RTX 4090"
    assert 22 * GIB < machine.gpu_bytes < 24 * GIB


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"called 'RTX 9999' .*RTX 4090, .*--gpu-memory"):
        machine_named("RTX 9999")


def test_estimated_rates_stay_below_the_peaks_and_say_what_they_are():
    for machine in MACHINES.values():
        rates = machine.rates()
        assert "estimated" in rates.machine
        assert max(rates.attention_flops.values()) < machine.tflops * 1e12
        assert rates.h2d_bytes_s < machine.bus_gb_s * 1e9
        assert rates.weight_bytes_s < machine.memory_gb_s * 1e9
