"""What the recipes take: folders, models, flags and cards, and how they say what is missing."""

from __future__ import annotations

import pytest

from propeller.launch import num_ranks


def make_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


class TestWhatIsMissing:
    """Each is named, by a message with one line, and Python is not started."""

    @pytest.fixture
    def error(self, start, tmp_path):
        def run(recipe, *flags, **environment):
            (tmp_path / "python").write_text("#!/bin/sh\necho started\n")
            (tmp_path / "python").chmod(0o755)
            done = start(recipe, *flags, **{"PYTHON": tmp_path / "python", **environment})
            assert (done.returncode, done.stdout) == (2, "")
            (line,) = done.stderr.splitlines()
            return line

        return run

    @pytest.mark.parametrize("value", [None, ""])
    @pytest.mark.parametrize("name", ["TASK_DATA_PATH", "MODEL_PATH"])
    @pytest.mark.parametrize("recipe", ["zh_task/ernie_base/run_drcd.sh", "en_glue/ernie_base/CoLA/task.sh"])
    def test_a_variable(self, error, recipe, name, value):
        assert error(recipe, **{name: value}).startswith(f"error: {name} is not set. Name the folder of the ")

    @pytest.mark.parametrize("name", ["TASK_DATA_PATH", "MODEL_PATH"])
    def test_a_folder(self, error, name):
        line = error("zh_task/ernie_base/run_lcqmc.sh", **{name: "/no where"})
        assert line.startswith(f"error: {name} is /no where, which is no folder; expected the folder of the ")

    @pytest.mark.parametrize(
        ("recipe", "files", "missing"),
        [
            ("zh_task/ernie_base/run_ChnSentiCorp.sh", [], "chnsenticorp"),
            ("zh_task/ernie_base/run_msra_ner.sh", ["msra_ner/dev.tsv"], "msra_ner/train.tsv or "),
            ("zh_task/ernie_base/run_msra_ner.sh", ["msra_ner/train.tsv.gz"], "msra_ner/dev.tsv or "),
            (
                "zh_task/ernie_large/run_cmrc2018.sh",
                ["cmrc2018/train.json"],
                "cmrc2018/dev.json or cmrc2018/cmrc2018_dev.json or ",
            ),
            ("zh_task/ernie_base/run_drcd.sh", ["drcd/train.json", "drcd/dev.json"], "drcd/test.json or "),
            ("en_glue/ernie_large/MNLI/task.sh", ["MNLI/train.tsv"], "MNLI/dev.tsv or "),
        ],
    )
    def test_data(self, error, tmp_path, recipe, files, missing):
        folder = tmp_path / "data"
        folder.mkdir()
        for name in files:
            make_file(folder / name)
        line = error(recipe, TASK_DATA_PATH=f"{folder}/")
        assert line.startswith(f"error: TASK_DATA_PATH is {folder}, in which there is no {missing}")

    @pytest.mark.parametrize(
        ("recipe", "files", "missing"),
        [
            ("zh_task/ernie_base/run_bq.sh", ["weights"], "ernie_config.json or config.json or "),
            ("zh_task/ernie_base/run_bq.sh", ["params/weights"], "vocab.txt."),
            ("zh_task/ernie_base/run_bq.sh", ["params/weights", "vocab.txt"], "ernie_config.json."),
            (
                "zh_task/ernie_tiny/run_lcqmc.sh",
                ["params/weights", "vocab.txt", "ernie_config.json"],
                "subword/spm_cased_simp_sampled.model or ",
            ),
        ],
    )
    def test_parts_of_the_model(self, error, tmp_path, recipe, files, missing):
        for name in files:
            make_file(tmp_path / "model" / name)
        line = error(recipe, MODEL_PATH=tmp_path / "model")
        assert line.startswith(f"error: MODEL_PATH is {tmp_path}/model, in which there is no {missing}")

    def test_python(self, error):
        assert "there is no /no/python here" in error("zh_task/ernie_base/run_bq.sh", PYTHON="/no/python")

    @pytest.mark.parametrize("number", ["0", "08", "two", "-1", "1.5"])
    def test_a_number_of_cards(self, error, number):
        expected = f"error: NPROC, or --nproc, is '{number}'; expected a number of cards, or auto."
        assert error("zh_task/ernie_base/run_bq.sh", NPROC=number) == expected
        assert error("zh_task/ernie_base/run_bq.sh", "--nproc", number) == expected


class TestFlags:
    def test_the_users_win(self, call, tmp_path):
        flags = ["--run_config", '{"max_steps": 2}', "--hparam", '{"learning_rate": 1.0}', "--max_seqlen", 64]
        found = call("zh_task/ernie_base/run_ChnSentiCorp.sh", *flags)
        assert found.run_config.max_steps == 2 and found.run_config.eval_steps == 100
        assert found.hparams.learning_rate == 1.0 and found.hparams.batch_size == 24
        assert found.args.max_seqlen == 64

    def test_they_reach_each_seed(self, call):
        found = call("en_glue/ernie_base/RTE/task.sh", "--hparam", '{"batch_size": 5}', SEEDS="7,8")
        assert found.tune.seeds == [7, 8]
        assert found.hparams.batch_size == 5

    def test_seeds_for_a_chinese_task(self, call, tmp_path):
        found = call("zh_task/ernie_base/run_lcqmc.sh", SEEDS="1,2")
        assert found.tune.seeds == [1, 2] and found.tune.output_dir == str(tmp_path / "output")

    def test_any_folder_and_any_name_will_do(self, call, task_data, tmp_path):
        """Folders are the caller's, relative ones too."""
        (tmp_path / 'an "odd" \\ name, isn\'t it? $HOME').symlink_to(task_data / "zh")
        (name,) = (path.name for path in tmp_path.iterdir() if path.is_symlink())
        found = call("zh_task/ernie_base/run_msra_ner.sh", TASK_DATA_PATH=name, OUTPUT_DIR=f"out {name}")
        assert found.args.data_dir == f"{name}/msra_ner"
        assert found.run_config.model_dir == f"out {name}"

    @pytest.mark.parametrize(
        ("recipe", "folder"),
        [
            ("zh_task/ernie_large/run_drcd.sh", "output/zh_task/ernie_large/run_drcd"),
            ("en_glue/ernie_base/STS-B/task.sh", "output/en_glue/ernie_base/STS-B"),
        ],
    )
    def test_each_has_a_folder_of_its_own(self, call, recipe, folder):
        found = call(recipe, OUTPUT_DIR=None)
        assert folder == (found.tune.output_dir if found.tune else found.run_config.model_dir)


class TestCards:
    @pytest.mark.parametrize(
        ("recipe", "nproc", "parts"),
        [
            ("zh_task/ernie_base/run_cmrc2018.sh", 4, 1),
            ("zh_task/ernie_base/run_cmrc2018.sh", 2, 2),
            ("zh_task/ernie_large/run_cmrc2018.sh", 3, 3),
            ("zh_task/ernie_base/run_msra_ner.sh", 8, 1),
            ("zh_task/ernie_base/run_xnli.sh", 8, 1),
            ("en_glue/ernie_base/MRPC/task.sh", 2, 1),
        ],
    )
    def test_the_batch_of_a_step_stays(self, call, recipe, nproc, parts):
        published = call(recipe).hparams
        flags = [(["--nproc", nproc], {}), ([f"--nproc={nproc}"], {"NPROC": "5"}), ([], {"NPROC": nproc})]
        for words, environment in flags:
            found = call(recipe, *words, **environment)
            assert found.hparams == published
            assert found.args.nproc == str(nproc) and found.run_config.micro_batches == parts

    def test_auto_takes_what_there_is(self, call):
        found = call("zh_task/ernie_base/run_dbqa.sh", NPROC="auto")
        ranks = num_ranks("auto")
        assert found.args.nproc == (None if ranks == 1 else str(ranks))
        assert found.run_config.micro_batches == -(-8 // ranks)


class TestModels:
    def test_a_folder_as_it_is(self, call, models):
        found = call("zh_task/ernie_base/run_thuc.sh", MODEL_PATH=models / "saved")
        assert found.args.warm_start_from == str(models / "saved")
        assert found.args.vocab_file is None

    def test_a_folder_of_hugging_face(self, call, root):
        folder = root / "tests" / "data" / "bert_tiny"
        assert call("en_glue/ernie_base/CoLA/task.sh", MODEL_PATH=folder).args.warm_start_from == str(folder)

    def test_the_older_layout(self, call, models):
        found = call("zh_task/ernie_base/run_thuc.sh", MODEL_PATH=models / "older")
        assert found.args.warm_start_from == str(models / "older/params")
        assert found.args.vocab_file == str(models / "older/vocab.txt")
        assert found.hparams.hidden_size == 8, "from ernie_config.json"
        assert found.hparams.learning_rate == 3e-5

    def test_word_pieces_of_ernie_tiny(self, call, models):
        found = call("zh_task/ernie_tiny/run_dbqa.sh")
        subword = models / "older" / "subword"
        assert found.args.sentence_piece_model == str(subword / "spm_cased_simp_sampled.model")
        assert found.args.word_dict == str(subword / "dict.wordseg.pickle")

    def test_names_of_ernie_tiny_label_single_characters(self, call):
        found = call("zh_task/ernie_tiny/run_msra_ner.sh")
        assert found.args.sentence_piece_model is None
        assert found.flag("--use_sentence_piece_vocab") == "true"
