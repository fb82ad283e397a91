"""Configurations with faults, for ``test_configuration_faults_are_listed.py``.

A fault is planted by a comment at the end of its line: ``# ! KEY | WORDS | WORDS`` says that exactly one fault
must be listed for this line and key (below ``tool.hessdiag``), and what it must say; no other may be listed.
"""

from __future__ import annotations

HEAD = '[project]\nname = "x"  # "[tool.hessdiag]" comes below\n\n[tool.hessdiag]\nproblem = "p.py:digits"\n'
CONFIGS = {
    "unknown keys, everywhere": """
        chekpoint = "a.pt"  # ! chekpoint | did you mean checkpoint?
        volume = 3  # ! volume | no such key | allowed: schema, problem
        probes = 16  # ! probes | belongs into the table run
        [tool.hessdiag.run]
        prob = 16  # ! run.prob | did you mean probes?
        bn = "eval"  # ! run.bn | no such key | allowed:
        quantitie = ["trace"]  # ! run.quantitie | did you mean quantities?
        [tool.hessdiag.check]
        max_probe = 64  # ! check.max_probe | did you mean max_probes?
        [tool.hessdiag.check.budgets]
        trace = { max_incease = "10%" }  # ! check.budgets.trace.max_incease | did you mean max_increase?
    """,
    "wrong types": """
        schema = "1"  # ! schema | "1" | a whole number
        checkpoint = 3  # ! checkpoint | 3 | text in quotes
        trust_pickle = "yes"  # ! trust_pickle | true or false
        options = []  # ! options | a table
        [tool.hessdiag.run]
        samples = 1e3  # ! run.samples | 1000.0 | a whole number
        seed = true  # ! run.seed | true | a whole number
        rtol = "1%"  # ! run.rtol | a number
        params = "layer4.*"  # ! run.params | a list
        split = ["train"]  # ! run.split | text in quotes
        quantities = "trace"  # ! run.quantities | a list
        [tool.hessdiag.check]
        confidence = "95%"  # ! check.confidence | a number
        max_probes = 1.5  # ! check.max_probes | a whole number
        [tool.hessdiag.check.budgets]
        trace = 80  # ! check.budgets.trace | 80 | a table | max_increase
        lambda_max = { max = 1, abs_floor = "1" }  # ! check.budgets.lambda_max.abs_floor | a number
    """,
    "a list under its former name": """
        [tool.hessdiag.run]
        quantities = ["trace"]
        metrics = ["lambda_max"]  # ! run.metrics | no such key
    """,
    "settings out of range": """
        [tool.hessdiag.run]
        samples = 0  # ! run.samples | at least 1
        probes = 1  # ! run.probes | at least 2, 1 more
        rtol = nan  # ! run.rtol | less than 1
        operator = "hesian"  # ! run.operator | did you mean hessian?
        method = "magic"  # ! run.method | forward_over_reverse
        dtype = "float16"  # ! run.dtype | float32, float64
        quantities = ["trace", "loud", "trace"]  # ! run.quantities.1 | "loud" # ! run.quantities.2 | twice
    """,
    "keys in the wrong place": """
        confidence = 0.9  # ! confidence | into the table check
        budgets = {}  # ! budgets | into the table check
        [tool.hessdiag.run]
        on_unsure = "report"  # ! run.on_unsure | into the table check
        app_dir = "folder"  # ! run.app_dir | above all tables
        [tool.hessdiag.check]
        samples = 3  # ! check.samples | into the table run
    """,
    "settings that contradict each other": """
        run = { operator = "ggn", method = "finite_difference" }  # ! run.operator | drop one
    """,
    "a check out of range": """
        [tool.hessdiag.run]
        probes = 64
        confidence = 0.9  # ! run.confidence | differs from check.confidence
        [tool.hessdiag.check]
        baseline = "folder"  # ! check.baseline | "folder" is a folder | name a file
        confidence = 0.99
        on_unsure = "guess"  # ! check.on_unsure | escalate, report
        max_probes = 32  # ! check.max_probes | 32 | 64 of run.probes
    """,
    "a confidence nobody has": "check.confidence = 1.0  # ! check.confidence | 1.0 | 0.5 to less than 1",
    "no check at all": """
        check = 3  # ! check | 3 | a table
        app_dir = "nowhere"  # ! app_dir | no such folder
    """,
    "limits that cannot be kept": """
        [tool.hessdiag.check.budgets]
        lambda_max = { min = 2, max = 1 }  # ! check.budgets.lambda_max | min 2 is above max 1
        trace = { max_increase = -1 }  # ! check.budgets.trace.max_increase | -1 | at least 0
        lambda_min = { min = nan }  # ! check.budgets.lambda_min.min | nan | finite
        ws_upper = { max = inf }  # ! check.budgets.ws_upper.max | inf | finite
        ws_lower = { max = "5%" }  # ! check.budgets.ws_lower.max | "5%" | a number | max_increase
        effective_rank = { max_decrease = "-5%" }  # ! check.budgets.effective_rank.max_decrease | "15%"
        negative_mass = { level = "warn" }  # ! check.budgets.negative_mass | has no limit | level = "off"
        frobenius_squared = { max = true }  # ! check.budgets.frobenius_squared.max | True | a number
        "trace@a" = { max_increase = "1e999%" }  # ! check.budgets."trace@a".max_increase | inf | finite
        "trace@b" = { max = 1, abs_floor = -1 }  # ! check.budgets."trace@b".abs_floor | -1 | from 0 on
        "trace@c" = { max = 1, abs_floor = nan }  # ! check.budgets."trace@c".abs_floor | from 0 on
        "trace@d" = { max = LARGE }  # ! check.budgets."trace@d".max | too large
        "trace@e" = { level = "off" }
    """,
    "levels and claims": """
        [tool.hessdiag.check.budgets]
        trace = { level = "eror" }  # ! check.budgets.trace.level | did you mean error?
        lambda_max = { max = 1, claim = "world" }  # ! check.budgets.lambda_max.claim | samples, population
        ws_upper = { max = 1, claim = "population" }  # ! check.budgets.ws_upper.claim | lambda_min, trace
        lambda_min = { min = 1, claim = "population" }
    """,
    "budgets of nothing": """
        [tool.hessdiag.check.budgets]
        lambda_maxx = { max = 1 }  # ! check.budgets.lambda_maxx | did you mean lambda_max?
        density = { max = 1 }  # ! check.budgets.density | no metric 'density' | allowed:
        "trace[]" = { max = 1 }  # ! check.budgets."trace[]" | metric[split]
        "trace\\n@x" = { max = 1 }  # ! check.budgets."trace\\n@x" | metric[split]
        "" = { max = 1 }  # ! check.budgets."" | metric[split]
    """,
    "one matrix under two names": """
        run.split = "test"
        [tool.hessdiag.check.budgets]
        trace = { max = 1 }
        "trace[train]" = { max = 1 }
        "trace@*" = { max = 1 }
        "trace[test]" = { max = 2 }  # ! check.budgets."trace[test]" | the same as "trace" | keep one
        "trace[test]@*" = { max = 2 }  # ! check.budgets."trace[test]@*" | the same as "trace@*"
    """,
    "options no function takes": """
        [tool.hessdiag.options]
        checkpoint = "a.pt"  # ! options.checkpoint | the key checkpoint
        two-words = 1  # ! options.two-words | parameter of a Python function
        since = [{ day = 2026-11-21 }]  # ! options.since | dates | quotes
        width = 4
    """,
    "lines are counted through everything": '''
        checkpoint = """
        [tool.hessdiag.run]
        probes = 1
        """
        options.text = \'\'\'
        probes = 1\'\'\'
        options.list = [  # [tool.hessdiag.run]
            "]", "probes = 1", # ]
            [1, 2],
        ]
        "schema" = 0  # ! schema | 0 | it must be 1
        'trust\\_pickle' = 1  # ! "trust\\\\_pickle" | did you mean trust_pickle?
        [ tool . "hessdiag" . run ]  # spaces and quotes are allowed
          probes = 1  # ! run.probes | at least 2
        [[tool.other]]
        probes = 1
        [[tool.other]]
        [tool.hessdiag.check.budgets.trace]
        max = "1"  # ! check.budgets.trace.max | a number
        [tool.hessdiag.check.budgets."trace@layer4.*"]
        level = "loud"  # ! check.budgets."trace@layer4.*".level | off, warn, error
    ''',
    "a list over lines is one place": """
        [tool.hessdiag.run]
        quantities = [  # ! run.quantities.1 | did you mean trace?
            "lambda_max",
            "trac",
        ]
    """,
    "a newer schema is the only fault": """
        schema = 2  # ! schema | newer | update hessdiag
        nonsense = 3
    """,
}
BROKEN_TOML = {
    "a key twice": ("trace = 1\n[a]\nb = 1\nb = 2\n", 9, "keep one"),
    "a table twice": ("[a]\n[b]\n[a]\n", 8, "keep one"),
    "a quote too few": ('\n\nx = "abc\n', 8, "no TOML"),
    "a bracket too few": ("x = [1,\n\n", 6, "no TOML"),
    "no key": ("= 3\n", 6, "no TOML"),
    "too deep": ("x = " + 3000 * "[" + "\n", 1, "no TOML"),
    "a number too long": ("x = " + 5000 * "1" + "\n", 1, "no TOML"),
}
"""What follows `HEAD` (of 5 lines), the line that must be named, and what must be said."""
