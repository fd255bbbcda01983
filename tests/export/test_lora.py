"""LoRAs: merged as by diffusers and PEFT, in every style of keys; errors for those that cannot be merged."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from export.names import our_name
from helpers import command, digest, expected, export, keys, refused, tensors
from safetensors.torch import save_file


def lora(style, with_alpha):
    """{key: tensor} of a random LoRA of rank 4 for some modules of the small transformer,
    with the keys of one style."""
    generator = torch.Generator().manual_seed(5)
    dim, ffn = 48, 104
    modules = {f"blocks.{i}.{a}.{m}": (dim, dim) for i in (0, 1) for a in ("self_attn", "cross_attn") for m in "qkvo"}
    modules |= {f"blocks.{i}.ffn.{n}": shape for i in (0, 1) for n, shape in ((0, (ffn, dim)), (2, (dim, ffn)))}
    renames = {"self_attn.": "attn1.to_", "cross_attn.": "attn2.to_", "to_o": "to_out.0", "ffn.0": "ffn.net.0.proj",
               "ffn.2": "ffn.net.2"}
    out = {}
    for module, (rows, columns) in modules.items():
        down, up = (torch.randn(shape, generator=generator) / 4 for shape in ((4, columns), (rows, 4)))
        if style == "diffusers":
            for ours, theirs in renames.items():
                module = module.replace(ours, theirs)
            base, a, b = f"transformer.{module}", "lora_A", "lora_B"
        elif style == "kohya":
            base, a, b = "lora_unet_" + module.replace(".", "_"), "lora_down", "lora_up"
        else:
            base, (a, b) = f"diffusion_model.{module}", style.split()
        out |= {f"{base}.{a}.weight": down, f"{base}.{b}.weight": up}
        if with_alpha:
            out[f"{base}.alpha"] = torch.tensor(float(1 + len(out) % 7))
    return out


def fused(folders, path, scale):
    """The transformer's weights after diffusers' load_lora_weights and fuse_lora, under diffusers' names."""
    from diffusers import WanPipeline
    transformer = WanTransformer3DModel.from_pretrained(folders / "diffusers/transformer")
    pipe = WanPipeline(None, None, None, None, transformer)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    return transformer.state_dict()


@pytest.mark.parametrize("style, with_alpha", [
    ("lora_A lora_B", False), ("lora_A lora_B", True), ("lora_down lora_up", True), ("kohya", True),
    ("diffusers", False)])
@pytest.mark.parametrize("scale", [1.0, 0.35])
def test_lora_is_merged_as_diffusers_merges(tmp_path, folders, capsys, style, with_alpha, scale):
    path = tmp_path / "style.safetensors"
    weights = lora(style, with_alpha)
    if style.startswith("lora_"):
        weights |= {f"diffusion_model.blocks.{i}.ffn.2.diff_b": torch.full((48,), 0.25) for i in (0, 1)}
    save_file(weights, path)
    file = tensors(export(folders / "diffusers", tmp_path / "out.gguf", "--type", "f32", "--lora", f"{path}:{scale}"))
    assert f"{len(weights)} keys applied" in capsys.readouterr().err
    source, changed = expected(folders), 0
    for name, reference in fused(folders, path, scale).items():
        ours = file[our_name("transformer", name)][1]
        reference = reference.numpy().reshape(ours.shape)
        assert np.abs(ours - reference).max() <= 1e-6 * np.abs(reference).max(), name
        changed += not np.array_equal(ours, source[our_name("transformer", name)])
    assert changed >= 20


def test_alpha_of_the_adapter_metadata(tmp_path, folders):
    from peft import LoraConfig
    path, weights = tmp_path / "lora.safetensors", lora("diffusers", False)
    modules = sorted({k.split(".lora_")[0].removeprefix("transformer.") for k in weights})
    config = LoraConfig(r=4, lora_alpha=10, target_modules=modules).to_dict()
    values = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    save_file(weights, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(values)})
    file = tensors(export(folders / "diffusers", tmp_path / "out.gguf", "--type", "f32", "--lora", path))
    name = "blocks.1.ffn.net.2.weight"
    reference = fused(folders, path, 1.0)[name].numpy()
    assert np.abs(file["blocks.1.ffn.2.weight"][1] - reference).max() <= 1e-6 * np.abs(reference).max()
    down, up = (weights[f"transformer.blocks.1.ffn.net.2.{k}.weight"] for k in ("lora_A", "lora_B"))
    difference = reference - expected(folders)["blocks.1.ffn.2.weight"]
    assert np.allclose(difference, 2.5 * (up @ down).numpy(), atol=1e-5)


def adapter(folders, folder, config):
    """The transformer with a PEFT adapter, which is saved in a folder."""
    from peft import get_peft_model
    transformer = WanTransformer3DModel.from_pretrained(folders / "diffusers/transformer")
    model = get_peft_model(transformer, config)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")  # PEFT warns about biases
@pytest.mark.parametrize("options", [
    {"lora_alpha": 16}, {"lora_alpha": 16, "lora_bias": True}, {"lora_alpha": 3.5, "use_rslora": True},
    {"lora_alpha": 2, "alpha_pattern": {"ffn.net.2": 7, r"blocks\.1\.attn1\.to_q": 5}, "rank_pattern": {"to_q": 2}}])
def test_an_adapter_as_peft_saves_it(tmp_path, folders, capsys, options):
    from peft import LoraConfig
    model = adapter(folders, tmp_path / "adapter", LoraConfig(
        r=4, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False, **options))
    path = tmp_path / "adapter/adapter_model.safetensors"
    file = tensors(export(folders / "diffusers", tmp_path / "out.gguf", "--type", "f32", "--lora", path))
    for name, reference in model.merge_and_unload().state_dict().items():
        ours, reference = file[our_name("transformer", name)][1], reference.numpy()
        assert np.abs(ours - reference.reshape(ours.shape)).max() <= 2e-6 * np.abs(reference).max(), name
    (tmp_path / "adapter/adapter_config.json").unlink()
    (tmp_path / "out.gguf").unlink()
    assert "adapter_config.json" in refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", path)


@pytest.mark.parametrize("down, alpha, says", [
    (torch.ones(4, 48, dtype=torch.int8), torch.tensor(4.0), "lora_A.weight is I8"),
    (torch.full((4, 48), math.nan), torch.tensor(4.0), "NaN or infinity after merging its LoRAs"),
    (torch.ones(4, 48), torch.ones(2), "cannot be read"),
    (torch.ones(0, 48), torch.tensor(4.0), "expected a rank above 0"),
    (torch.ones(3, 48), torch.tensor(4.0), "has rank 4"),
    (torch.tensor(1.0), torch.tensor(4.0), "expected a rank above 0")])
def test_lora_values_that_are_none_are_refused(tmp_path, folders, capsys, down, alpha, says):
    base, path = "diffusion_model.blocks.0.self_attn.q", tmp_path / "lora.safetensors"
    save_file({f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": torch.ones(48, 4), f"{base}.alpha": alpha}, path)
    capsys.readouterr()
    assert command.main([str(folders / "diffusers"), "-o", str(tmp_path / "out.gguf"), "--lora", str(path)]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out.gguf").exists()


def test_loras_add_up_and_differences_apply(tmp_path, folders):
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(48, 48),
               "diffusion_model.patch_embedding.diff": torch.ones(48, 16, 1, 2, 2),
               "diffusion_model.blocks.1.diff_m": torch.ones(1, 6, 48),
               "diffusion_model.blocks.0.norm3.diff": torch.ones(48)}, tmp_path / "a.safetensors")
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(48, 48)}, tmp_path / "b.safetensors")
    reader = export(folders / "diffusers", tmp_path / "out.gguf", "--lora", tmp_path / "a.safetensors",
                    "--lora", f"{tmp_path / 'b.safetensors'}:0.5")
    file, source = tensors(reader), expected(folders)
    for name, difference in (("blocks.0.self_attn.q.weight", 1.5), ("patch_embedding.weight", 1),
                             ("blocks.1.modulation", 1), ("blocks.0.norm3.weight", 1),
                             ("blocks.0.self_attn.k.weight", 0)):
        assert np.allclose(file[name][1], source[name] + difference, atol=1e-6), name
    assert keys(reader)["sora.lora"] == ["a.safetensors:1", "b.safetensors:0.5"]


@pytest.mark.parametrize("key, shape, says", [
    ("diffusion_model.blocks.7.self_attn.q.lora_A.weight", (4, 48), "matches no tensor"),
    ("lora_te_blocks_0_attn_q.lora_down.weight", (4, 48), "matches no tensor"),
    ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", (4, 48), "is alone, expected both matrices"),
    ("diffusion_model.blocks.0.self_attn.q.diff", (48, 47), "has shape [48, 47]"),
    ("diffusion_model.blocks.0.self_attn.q.alpha", (), "is alone, expected both matrices")])
def test_lora_keys_that_do_not_apply_are_named(tmp_path, folders, capsys, key, shape, says):
    save_file({key: torch.ones(shape)}, tmp_path / "lora.safetensors")
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", tmp_path / "lora.safetensors")
    assert key in line and says in line


def test_a_lora_of_another_shape_is_refused(tmp_path, folders, capsys):
    base = "diffusion_model.blocks.0.ffn.0"  # transposed shape, same number of elements
    save_file({f"{base}.lora_A.weight": torch.ones(4, 104), f"{base}.lora_B.weight": torch.ones(48, 4)},
              tmp_path / "lora.safetensors")
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", tmp_path / "lora.safetensors")
    assert f"{base}.lora_B.weight has shape [48, 104], expected [104, 48] as blocks.0.ffn.0.weight" in line


@pytest.mark.parametrize("option, says", [
    ("nowhere.safetensors", "nowhere.safetensors: "),
    ("a.safetensors:nan", "'nan' is not a number, expected FILE or FILE:SCALE"),
    ("a.safetensors:half", "'half' is not a number, expected FILE or FILE:SCALE")])
def test_a_lora_that_cannot_be_applied_is_named(tmp_path, folders, capsys, option, says):
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", tmp_path / option)
    assert says in line and "None" not in line


# ---------------------------------------------------------------- spellings

SPELLINGS = {  # from the keys of ComfyUI, diffusion_model.blocks.N.self_attn.q.lora_A.weight, to others
    "DiffSynth": lambda k: "pipe.dit." + k.replace("_A.", "_A.default.").replace("_B.", "_B.default."),
    "an adapter's name": lambda k: "transformer." + k.replace("_A.", "_A.my-style_2.").replace("_B.", "_B.my-style_2."),
    "unet": lambda k: "unet." + k,
    "bare": lambda k: k,
    "without weight": lambda k: k.removesuffix(".weight"),
    "lora.down": lambda k: k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "kohya": lambda k: flat("lora_unet_", k),
    "kohya with two underscores": lambda k: flat("lora_unet__", k),
    "kohya for a transformer": lambda k: flat("lora_transformer_", k),
    "compiled": lambda k: "model.diffusion_model._orig_mod." + k,
}


def flat(prefix, key):
    module, _, end = key.partition(".lora_")
    if not end:
        module, end = key.removesuffix(".alpha"), "alpha"
    else:
        end = "lora_" + {"A": "down", "B": "up"}[end[0]] + ".weight"
    return prefix + module.replace(".", "_") + "." + end


@pytest.mark.parametrize("style", SPELLINGS)
def test_spellings_mean_the_same(tmp_path, folders, style):
    weights, digests = lora("lora_A lora_B", True), []
    for name, spell in (("comfy", lambda k: "diffusion_model." + k), ("other", SPELLINGS[style])):
        path = tmp_path / f"{name}.safetensors"
        save_file({spell(k.removeprefix("diffusion_model.")): v for k, v in weights.items()}, path)
        digests.append(digest(export(folders / "diffusers", tmp_path / "out.gguf", "--lora", path)))
    assert digests[0] == digests[1]


def test_keys_that_match_nothing_can_be_left_out(tmp_path, folders, capsys):
    weights, path = lora("lora_A lora_B", True), tmp_path / "lora.safetensors"
    save_file(weights, path)
    alone = digest(export(folders / "diffusers", tmp_path / "out.gguf", "--lora", path))
    others = {"lora_te_blocks_0_attn_q.lora_down.weight": torch.ones(4, 40), "something.else": torch.ones(1),
              "diffusion_model.blocks.7.self_attn.q.lora_A.weight": torch.ones(4, 48),
              "diffusion_model.img_emb.proj.1.diff": torch.ones(4), "diffusion_model.blocks.7.self_attn.q.alpha":
              torch.tensor(4)}
    save_file(weights | others, path)
    (tmp_path / "out.gguf").unlink()
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", path)
    assert "matches no tensor of the transformer (--lora-skip-unmatched leaves such keys out)" in line
    file = export(folders / "diffusers", tmp_path / "out.gguf", "--lora", path, "--lora-skip-unmatched")
    assert digest(file) == alone
    assert f"{len(weights)} keys applied to 20 tensors, scale 1; 5 keys that match no tensor left out" in \
        capsys.readouterr().err
    save_file(others, path)
    (tmp_path / "out.gguf").unlink()
    assert "no key changes a tensor" in refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", path,
                                        "--lora-skip-unmatched")


# ---------------------------------------------------------------- methods other than LoRA

def relatives():
    """{name: (settings of a PEFT adapter that is not plain LoRA, part of the error line)}."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig
    modules = {"target_modules": ["attn1.to_q"]}
    return {
        "DoRA": (LoraConfig(r=4, use_dora=True, **modules), "DoRA, which scales each row, cannot be merged"),
        "LoKr": (LoKrConfig(r=4, **modules), "LoKr, a Kronecker product, cannot be merged"),
        "LoHa": (LoHaConfig(r=4, **modules), "LoHa, a Hadamard product, cannot be merged"),
        "PiSSA": (LoraConfig(r=4, init_lora_weights="pissa", **modules),
                  "PiSSA, which changes the base weights before training, cannot be merged"),
        "PiSSA, quickly": (LoraConfig(r=4, init_lora_weights="pissa_niter_4", **modules), "PiSSA, which changes"),
        "OLoRA": (LoraConfig(r=4, init_lora_weights="olora", **modules), "LoRA that changes the base weights"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DoRA", "LoKr", "LoHa", "PiSSA", "PiSSA, quickly", "OLoRA"])
@pytest.mark.parametrize("skip", [[], ["--lora-skip-unmatched"]])
def test_relatives_of_lora_are_named(tmp_path, folders, capsys, name, skip):
    config, says = relatives()[name]
    adapter(folders, tmp_path / "adapter", config)
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora",
                   tmp_path / "adapter/adapter_model.safetensors", *skip)
    assert says in line


@pytest.mark.parametrize("key, says", [("dora_scale", "DoRA"), ("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"),
                                       ("oft_blocks", "OFT"), ("lora_mid.weight", "LoCon with a core tensor")])
def test_relatives_in_kohyas_keys_are_named(tmp_path, folders, capsys, key, says):
    save_file(lora("kohya", True) | {f"lora_unet_blocks_0_self_attn_q.{key}": torch.ones(4, 4)},
              tmp_path / "lora.safetensors")
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", tmp_path / "lora.safetensors")
    assert f"lora.safetensors: {says}" in line and f"cannot be merged (lora_unet_blocks_0_self_attn_q.{key})" in line


@pytest.mark.parametrize("values, says", [
    ({"lora_alpha": None}, "lora_alpha is null, expected a number"),
    ({"lora_alpha": "4"}, 'lora_alpha is "4", expected a number'),
    ({"peft_type": "LOHA"}, 'another method than LoRA, cannot be merged (peft_type is "LOHA")'),
    ({"fan_in_fan_out": True}, "LoRA of transposed weights, cannot be merged (fan_in_fan_out is true)"),
    ({"alpha_pattern": 3}, "cannot be read"), ({"alpha_pattern": {"(": 3}}, "cannot be read")])
def test_settings_of_peft_that_cannot_be_followed(tmp_path, folders, capsys, values, says):
    path = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("transformer.", "base_model.model."): v for k, v in lora("diffusers", False).items()}, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4} | values))
    assert says in refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", path)
