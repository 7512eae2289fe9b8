"""The API key: made once, readable by its owner only, refused where others can read it."""

import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import api_keys, lasting_endpoint


def test_key_is_made_once_for_its_owner_only(tmp_path):
    key, path = api_keys.read_or_make(None, tmp_path / "serve" / "api_key")
    assert len(key) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert api_keys.read_or_make(None, path) == (key, path)


def test_configured_key_is_used_and_never_made(tmp_path):
    with pytest.raises(BadInputError, match="cannot be read"):
        api_keys.read_or_make(str(tmp_path / "mine"), tmp_path / "default")
    (tmp_path / "mine").touch(0o600)
    (tmp_path / "mine").write_text("secret-1\n")
    assert api_keys.read_or_make(str(tmp_path / "mine"), tmp_path / "default")[0] == "secret-1"
    assert not (tmp_path / "default").exists()


@pytest.mark.parametrize(("mode", "text", "problem"), [(0o640, "secret", "other users"), (0o600, "", "one word")])
def test_unusable_key_is_refused(tmp_path, mode, text, problem):
    path = tmp_path / "mine"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(BadInputError, match=problem):
        api_keys.read_or_make(str(path), tmp_path / "default")


def test_endpoint_tells_how_to_ask_without_showing_the_key(tmp_path):
    key, path = api_keys.read_or_make(None, tmp_path / "api_key")
    endpoint = lasting_endpoint.Endpoint("http://10.0.0.1:8000/v1", "tiny", ["n0", "n1"], str(path), "scancel 7")
    endpoint.write(tmp_path / "endpoint.json")
    assert lasting_endpoint.Endpoint.read(tmp_path / "endpoint.json") == endpoint
    for text in (endpoint.text(), (tmp_path / "endpoint.json").read_text()):
        assert key not in text
        assert "scancel 7" in text
