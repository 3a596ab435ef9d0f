"""Every script in tools/ can be imported, and those that are run say how."""

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
SCRIPTS = sorted(path.stem for path in TOOLS.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_imported_and_answers_help(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(TOOLS))
    for script in SCRIPTS:  # what another test has imported may be another version
        monkeypatch.delitem(sys.modules, script, raising=False)
    script = importlib.import_module(name)
    assert script.__doc__
    if 'if __name__ == "__main__":' not in (TOOLS / f"{name}.py").read_text("utf-8"):
        return  # the others import it
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code in (0, None)
    assert "--help" in capsys.readouterr().out
