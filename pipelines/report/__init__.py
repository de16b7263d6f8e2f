"""Report: a page about a finished run, which `train` writes at its end and `atcache report` for any run.

- `config`: the options of a report
- `run`: write the report of a run
- `after_training`: train, and then write the reports
- `finished`: what the folder of a finished run says, and where its data are
- `looking`: what the student predicts, and where it looks, on some validation samples
- `repeat`: the commands that make the run again, and what it ran on
- `sections`: the parts of the page
"""
