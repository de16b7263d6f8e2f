"""Published timm models: a folder or a repository of the hub becomes a plain name, its commit and its weights."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from atcache.errors import TeacherError
from atcache.teachers.load import create_student, load_teacher
from atcache.teachers.names import ModelName, parse_model_name
from atcache.teachers.weights import weights_sha256

# As pathology's models are published: arguments that timm's own model lacks, another mean, a size in pixels.
CONFIG = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "num_features": 32,
    "model_args": {
        "img_size": 32,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "init_values": 1e-5,
        "reg_tokens": 4,
        "global_pool": "",
        "dynamic_img_size": True,
        "act_layer": "silu",
        "pos_drop_rate": None,
    },
    "pretrained_cfg": {
        "tag": "uni",
        "input_size": [3, 32, 32],
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": [0.7, 0.5, 0.6],
        "std": [0.2, 0.3, 0.25],
        "license": "cc-by-nc-nd-4.0",
    },
}
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def own_model(seed: int = 0) -> torch.nn.Module:
    import timm

    torch.manual_seed(seed)
    arguments = {name: value for name, value in CONFIG["model_args"].items() if value is not None}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    for name, tensor in model.state_dict().items():
        if name.endswith("gamma"):
            tensor.copy_(torch.rand(tensor.shape))
    return model


def publish(folder: Path, config: object = CONFIG, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(own_model(seed).state_dict(), folder / "model.safetensors")
    return folder


def changed(**changes: Any) -> dict[str, Any]:
    return {**CONFIG, **changes}


class Hub:
    """As much of the hub as a download needs: revisions, files, and who may have them."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                hub.requests.append(self.path)
                match = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/([\w.-]+)", self.path)
                status, error, content, commit = 404, "RepoNotFound", b"", None
                if match:
                    repository, revision, filename = match.groups()
                    commit = COMMITS.get(revision, revision)
                    path = folder / repository / commit / filename
                    if repository == "lab/gated" and "Bearer hf_mine" not in self.headers.get("Authorization", ""):
                        status, error = 401, "GatedRepo"
                    elif (folder / repository).is_dir():
                        status, error = 404, "EntryNotFound" if path.parent.is_dir() else "RevisionNotFound"
                        if path.is_file():
                            status, error, content = 200, None, path.read_bytes()
                self.send_response(status)
                if error:
                    self.send_header("X-Error-Code", error)
                if commit:
                    self.send_header("X-Repo-Commit", commit)
                self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if with_body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    publish(folder / "lab/uni" / COMMITS["main"])
    publish(folder / "lab/uni" / COMMITS["v1"], seed=1)
    publish(folder / "lab/gated" / COMMITS["main"])
    torch.save(own_model().state_dict(), publish(folder / "lab/old" / COMMITS["main"]) / "pytorch_model.bin")
    (folder / "lab/old" / COMMITS["main"] / "model.safetensors").unlink()
    (folder / "lab/empty" / COMMITS["main"]).mkdir(parents=True)
    found = Hub(folder)
    yield found
    found.server.shutdown()
    found.server.server_close()


def load(names: list[str], home: Path, **environment: str) -> dict[str, Any]:
    """What a process with this home folder and hub loads under each name, or why not."""
    code = (
        "import json, sys\nfrom atcache.errors import TeacherError\nfrom atcache.teachers.load import load_teacher\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        t = load_teacher(name)\n"
        "        out = dict(name=str(t.name), source=t.source, sha=t.weights_sha256, licence=t.licence)\n"
        "    except TeacherError as error:\n"
        "        out = str(error)\n"
        "    print(json.dumps(out))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env={**os.environ, "HF_HOME": str(home), "HF_TOKEN": "", "NO_PROXY": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


REFUSED = {
    "hf-hub:lab/gated": r"Ask for access at http://[\d.:]+/lab/gated, then log in with `hf auth login` or set HF_TOKEN",
    "hf-hub:lab/none": "the hub has no repository lab/none, or it is private",
    "hf-hub:lab/uni@v9": "lab/uni has no branch, tag or commit 'v9'",
    "hf-hub:lab/empty": r"lab/empty has no file config\.json",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def found(hub, home) -> dict[str, Any]:
    """What a machine loads that has nothing yet."""
    return load(["hf-hub:lab/uni", "hf-hub:lab/uni@v1", "hf_hub:lab/old", *REFUSED], home, HF_ENDPOINT=hub.address)


def test_a_branch_becomes_a_commit(found):
    main = found["hf-hub:lab/uni"]
    assert main["name"].startswith(
        "vit_tiny_patch16_224:img_size=32,embed_dim=32,depth=2,num_heads=2,init_values=1e-05"
    )
    assert main["name"].endswith(f",weights_at=hf-hub:lab/uni@{COMMITS['main']}")
    assert main["source"] == f"hub:lab/uni@{COMMITS['main']}/model.safetensors"
    assert main["sha"] == weights_sha256(own_model(), without=("norm.", "head."))
    assert main["licence"] == "cc-by-nc-nd-4.0"


def test_a_revision_is_another_commit_with_other_weights(found):
    old = found["hf-hub:lab/uni@v1"]
    assert old["name"].endswith(f"weights_at=hf-hub:lab/uni@{COMMITS['v1']}")
    assert old["sha"] == weights_sha256(own_model(1), without=("norm.", "head."))


def test_weights_of_torch_are_taken_if_there_are_no_others(found):
    assert found["hf_hub:lab/old"]["source"] == f"hub:lab/old@{COMMITS['main']}/pytorch_model.bin"


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_refuses_is_said_in_a_sentence(name, found):
    assert re.search(REFUSED[name], found[name])


def test_a_later_load_takes_the_same_without_network(found, home):
    main = found["hf-hub:lab/uni"]  # as typed, and as a cache records it
    assert load(["hf-hub:lab/uni", main["name"]], home, HF_ENDPOINT="http://127.0.0.1:9") == {
        "hf-hub:lab/uni": main,
        main["name"]: main,
    }


def test_another_machine_fetches_the_recorded_commit_and_a_token_opens_what_is_gated(found, hub, tmp_path):
    old = found["hf-hub:lab/uni@v1"]
    elsewhere = load(
        [old["name"], "hf-hub:lab/gated"], tmp_path, HF_ENDPOINT=hub.address, HF_TOKEN="hf_mine", HF_HUB_OFFLINE="0"
    )
    assert elsewhere[old["name"]] == old
    assert elsewhere["hf-hub:lab/gated"]["source"] == f"hub:lab/gated@{COMMITS['main']}/model.safetensors"


def test_an_unreachable_hub_says_what_to_fetch_by_hand(tmp_path):
    error = load(["hf-hub:lab/uni"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")["hf-hub:lab/uni"]
    assert "hub cannot be reached. Download config.json of" in error
    assert "give local-dir:FOLDER as the model" in error


def test_a_folder_becomes_a_plain_name_with_its_arguments_and_input(tmp_path):
    folder = publish(tmp_path / "uni")
    teacher = load_teacher(f"local-dir:{folder}")
    assert teacher.name.timm_name == "vit_tiny_patch16_224"
    assert teacher.name.weights_at == f"local-dir:{folder}"
    assert teacher.source == "local-dir:uni"
    assert teacher.licence == "cc-by-nc-nd-4.0"
    assert teacher.weights_sha256 == weights_sha256(own_model(), without=("norm.", "head."))
    assert (teacher.input.height, teacher.input.interpolation, teacher.input.crop_pct) == (32, "bilinear", 1.0)
    assert (teacher.input.mean, teacher.input.std) == ((0.7, 0.5, 0.6), (0.2, 0.3, 0.25))
    assert teacher.tokens.num_prefix_tokens == 5
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(teacher.model.forward_features(image), own_model().eval().forward_features(image))
    assert parse_model_name(str(teacher.name)) == teacher.name


@pytest.mark.parametrize(("mode", "verb"), [("border", "pads"), ("squash", "squashes"), ("center", None)])
def test_a_note_says_that_views_are_not_squashed_or_padded_as_a_published_config_says(mode, verb, tmp_path, caplog):
    # The config says what its weights were made for. timm's own of this architecture squashes.
    about = {**CONFIG["pretrained_cfg"], "crop_mode": mode}
    arguments = {**CONFIG["model_args"], "act_layer": "gelu"}
    config = changed(architecture="vit_base_patch16_clip_384", pretrained_cfg=about, model_args=arguments)
    model = create_student(parse_model_name(f"local-dir:{publish(tmp_path / 'ours', config)}"), 0)
    save_file(model.state_dict(), tmp_path / "ours/model.safetensors")
    load_teacher(f"local-dir:{tmp_path / 'ours'}")
    notes = [message for message in caplog.messages if "its own transform" in message]
    assert [f"its own transform {verb} images" in note for note in notes] == [True] * (verb is not None)


def test_a_student_needs_neither_folder_nor_hub(tmp_path):
    folder = publish(tmp_path / "uni")
    recorded = str(load_teacher(f"local-dir:{folder}").name)
    weights = folder.rename(tmp_path / "moved") / "model.safetensors"
    student = create_student(parse_model_name(recorded), 3)
    assert student.reg_token.shape[1] == 4
    assert student.blocks[0].ls1.gamma.shape == (32,)
    assert student.head.out_features == 3
    with pytest.raises(TeacherError, match=r"no such folder\. Give the weights with --weights FILE"):
        load_teacher(recorded)
    assert load_teacher(recorded, weights=weights).name.weights_at is None, "the file given is not what is published"


@pytest.mark.parametrize(("more", "num_prefix_tokens"), [("", 5), (",class_token=False,reg_tokens=0", 0)])
def test_a_student_of_a_teacher_without_pooling_has_class_logits(more, num_prefix_tokens, tmp_path):
    name = parse_model_name(f"local-dir:{publish(tmp_path / 'uni')}:depth=2{more}")
    assert name.arguments["global_pool"] == ""
    student = create_student(name, 3)
    assert student.num_prefix_tokens == num_prefix_tokens
    assert student(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    fine_tuned = create_student(parse_model_name(f"local-dir:{tmp_path / 'uni'}"), 3, weights=tmp_path / "uni")
    assert torch.equal(fine_tuned.norm.weight, own_model().norm.weight)


def test_the_users_arguments_overrule_the_configs(tmp_path):
    folder = publish(tmp_path / "a:b=c")  # a folder may have a colon; arguments are behind the last that begins some
    name = parse_model_name(f"local-dir:{folder}:init_values=0.5,mean=(0.1,0.2,0.3)")
    assert (name.arguments["init_values"], name.arguments["mean"]) == (0.5, (0.1, 0.2, 0.3))
    assert parse_model_name(f"local-dir:{publish(tmp_path / 'a:b')}").weights_at == f"local-dir:{tmp_path / 'a:b'}"
    assert parse_model_name(str(name)) == name


def test_arguments_that_only_code_gives_are_taken_by_name(tmp_path):
    # Virchow's page says mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU.
    name = parse_model_name(f"local-dir:{publish(tmp_path / 'v')}:mlp_layer=SwiGLUPacked,act_layer=SiLU")
    mlp = create_student(name, 0).blocks[0].mlp
    assert type(mlp).__name__ == "GluMlp"
    assert isinstance(mlp.act, torch.nn.SiLU)
    with pytest.raises(TeacherError, match="mlp_layer=Nothing: expected one of Mlp, GluMlp"):
        create_student(parse_model_name("vit_tiny_patch16_224:mlp_layer=Nothing"), 0)


def test_an_older_config_has_all_at_the_top(tmp_path):
    flat = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, **CONFIG["pretrained_cfg"]}
    name = parse_model_name(f"local-dir:{publish(tmp_path / 'old', flat)}")
    assert name.arguments["img_size"] == (32, 32)
    assert name.arguments["num_classes"] == 7
    assert name.arguments["mean"] == (0.7, 0.5, 0.6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{broken", "its config.json is not JSON"),
        ('{"model_type": "vit"}', "does not name a timm architecture.* transformers, give transformers:"),
        ("[" * 100_000, "its config.json is not JSON"),
        ("[1]", "the top level of its config.json is list, expected an object"),
        ({"architectures": ["ViTModel"]}, "does not name a timm architecture, .*It may be a model of another library"),
        (changed(architecture="os.system"), "names 'os.system', expected a model of timm"),
        (changed(architecture=["x"]), "expected a model of timm"),
        (changed(model_args={"checkpoint_path": "/etc/passwd"}), "'checkpoint_path', which it does not have"),
        (changed(model_args={"pretrained": True}), "'pretrained', which it does not have"),
        (changed(model_args={"features_only": True}), "'features_only', which it does not have"),
        (changed(model_args={"block_fn": {"_target_": "os.system"}}), "block_fn=.*expected numbers or a word"),
        (changed(model_args={"depth": 10**9}), "depth=1000000000, expected at most 65536"),
        (changed(model_args={"img_size": [10**9, 3]}), "expected at most 65536"),
        (changed(model_args=[1]), "model_args of its config.json is list"),
        (changed(pretrained_cfg={"mean": [0.5]}), r"mean \[0.5\], expected three numbers"),
        (changed(pretrained_cfg={"std": ["a", "b", "c"]}), "expected three numbers"),
        (changed(model_args={}, pretrained_cfg={"input_size": 224}), "input_size 224, expected"),
    ],
)
def test_a_config_that_cannot_be_used_or_means_harm_is_refused(config, message, tmp_path):
    with pytest.raises(TeacherError, match=message):
        parse_model_name(f"local-dir:{publish(tmp_path / 'x', config)}")


@pytest.mark.parametrize(
    "name",
    ["hf-hub:uni", "hf-hub:a/b/c", "hf-hub:../x@..", "hf-hub:lab/uni@", "hf-hub:lab/uni@a b"],
)
def test_names_of_repositories_are_checked(name):
    with pytest.raises(TeacherError, match="expected hf-hub:ORG/MODEL or hf-hub:ORG/MODEL@REVISION"):
        parse_model_name(name)


def test_where_weights_are_is_the_last_argument():
    name = parse_model_name("vit_tiny_patch16_224:depth=2,weights_at=local-dir:/a,b=c")
    assert name == ModelName("vit_tiny_patch16_224", {"depth": 2}, "local-dir:/a,b=c")
    assert parse_model_name(str(name)) == name
    with pytest.raises(TeacherError, match="expected hf-hub:ORG/MODEL or local-dir:FOLDER as its last argument"):
        parse_model_name("vit_tiny_patch16_224:weights_at=/etc/passwd")
