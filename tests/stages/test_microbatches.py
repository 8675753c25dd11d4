"""A stage on another number of devices: which numbers of microbatches there are, which one is taken, what is refused."""

import dataclasses
import itertools

import pytest

from jaxllm.config import InputError
from jaxllm.life import Config
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh, planned_mesh
from jaxllm.sharding import batch_shards
from jaxllm.stages import microbatches

PRETRAIN = dataclasses.replace(Config().pretrain, batch_size=24, num_micro=1)


def config(**changes):
    section = dataclasses.replace(PRETRAIN, **changes)
    return dataclasses.replace(Config(), pretrain=section, mesh=MeshConfig(data=-1))


def fit(folder, devices, **changes):
    """num_micro on so many devices."""
    mesh = planned_mesh(MeshConfig(data=-1), devices)
    return microbatches.fit(config(**changes), "pretrain", mesh, folder).pretrain.num_micro


@pytest.mark.parametrize("sizes", [[24], [16, 12], [7]], ids=str)
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
def test_every_device_gets_as_many_rows_of_every_microbatch(sizes, shards):
    """Against the definition: equal microbatches, each of which the shards cut equally."""
    wanted = []
    for count in range(1, 30):
        cuts = [size / count for size in sizes] + [size / count / shards for size in sizes]
        if all(cut >= 1 and cut == int(cut) for cut in cuts):
            wanted.append(count)
    assert [*microbatches.possible_counts(sizes, shards)] == wanted


def test_with_fewer_devices_none_has_more_rows_than_before(tmp_path):
    assert fit(tmp_path, 8) == 1  # it begins: 3 rows each
    for devices, num_micro in {8: 1, 4: 2, 3: 4, 2: 4, 1: 8, 24: 1}.items():
        assert fit(tmp_path, devices) == num_micro
        assert 24 / num_micro / devices <= 3


def test_more_devices_than_rows_of_a_microbatch_take_fewer_microbatches(tmp_path):
    assert fit(tmp_path, 2, num_micro=4) == 4  # 3 rows each
    assert fit(tmp_path, 12, num_micro=4) == 1


def test_what_fitted_is_what_the_stage_began_with(tmp_path):
    """Not what it took meanwhile: a machine that was large for a day does not change what fits."""
    fit(tmp_path, 4)
    for devices in (8, 24, 2):
        fit(tmp_path, devices)
    assert fit(tmp_path, 4) == 1


def test_a_first_start_keeps_the_config(tmp_path):
    asked = config(num_micro=3)
    mesh = make_mesh(MeshConfig(data=-1))
    assert microbatches.fit(asked, "pretrain", mesh, tmp_path) is asked
    assert microbatches.fit(asked, "rank", mesh, tmp_path) is asked


def test_a_count_that_no_layout_divides_is_refused_with_those_that_could(tmp_path):
    fit(tmp_path, 8)
    with pytest.raises(InputError) as refusal:
        fit(tmp_path, 5)
    text = str(refusal.value)
    assert "pretrain.batch_size" in text and "24 does not divide over the 5 shards" in text
    assert "1, 2, 3, 4, 6, 8 devices could (up to 10)" in text


def test_both_batches_of_ppo_are_cut():
    section = Config().ppo
    ptx = dataclasses.replace(section.ptx, coef=0.5, batch_size=6)
    section = dataclasses.replace(section, batch_size=32, num_minibatches=2, ptx=ptx)
    assert microbatches.batch_sizes(section) == [16, 6]
    assert [*microbatches.possible_counts([16, 6], 2)] == [1]
    without = dataclasses.replace(section, ptx=dataclasses.replace(ptx, coef=0.0))
    assert microbatches.batch_sizes(without) == [16]


def test_shards_are_those_of_rows():
    """The tensor axis cuts no rows."""
    for tensor, data in itertools.product((1, 2), (1, 2, 4)):
        mesh = planned_mesh(MeshConfig(data=-1, tensor=tensor), tensor * data)
        assert batch_shards(mesh) == data
