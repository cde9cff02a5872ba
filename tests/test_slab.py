import torch

from server.engine.torch.slab import Slab, SlabShape

SHAPE = SlabShape(2, 8, torch.float32, (torch.device("cpu"), torch.device("meta")))


def test_bytes_per_token_count_keys_and_values_of_all_layers() -> None:
    assert SHAPE.bytes_per_token_and_layer == 2 * 2 * 8 * 4
    assert SHAPE.bytes_per_token == 2 * SHAPE.bytes_per_token_and_layer


def test_a_slab_grows_by_what_is_asked_and_keeps_what_it_holds() -> None:
    slab = Slab(SHAPE)
    assert slab.capacity == 0
    slab.reserve(5)
    slab.layers[0][:, :, :5] = torch.arange(5.0)[:, None]
    before = slab.capacity
    slab.reserve(before)
    assert slab.capacity == before
    slab.reserve(before + 1)
    assert before < slab.capacity < 3 * before
    assert slab.layers[0].shape == (2, 2, slab.capacity, 8)
    assert torch.equal(slab.layers[0][1, 1, :5, 7], torch.arange(5.0))


def test_each_layer_keeps_its_keys_and_values_on_its_own_device() -> None:
    slab = Slab(SHAPE)
    slab.reserve(1)
    assert [layer.device.type for layer in slab.layers] == ["cpu", "meta"]
