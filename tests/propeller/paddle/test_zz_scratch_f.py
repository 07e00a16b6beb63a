import importlib.util, pytest
from pathlib import Path
spec=importlib.util.spec_from_file_location("tr", Path(__file__).with_name("test_ranks.py")); tr=importlib.util.module_from_spec(spec); spec.loader.exec_module(tr)
@pytest.mark.parametrize(("size","count","seed"), [(1,20,s) for s in range(10,16)]+[(2,8,s) for s in range(10,14)])
def test_x(start_ranks, tmp_path, size, count, seed, monkeypatch):
    m=tr.moments
    monkeypatch.setattr(tr,"moments",lambda c,s,seed_=None,**k: m(c,s,seed))
    tr.test_a_run_that_is_killed_again_and_again(start_ranks,tmp_path,size,count)
    import json
    print(size,seed,[json.loads(l)["step"] for l in (tmp_path/"killed/metrics.jsonl").read_text().splitlines()][-1])
