"""The `atcache` command: one file for each sub-command.

- `main`: find the sub-command, import only that one, and turn errors into messages
- `plan`: `atcache plan`
- `probe`: `atcache probe`
- `build`: `atcache build`
- `merge`: `atcache merge`
- `push`: `atcache push`
- `pull`: `atcache pull`
- `info`: `atcache info`
- `stats`: `atcache stats`
- `compare`: `atcache compare`
- `show`: `atcache show`
- `view`: `atcache view`
- `verify`: `atcache verify`
- `train`: `atcache train`
- `evaluate`: `atcache eval`
- `report`: `atcache report`
- `maps`: `atcache maps`
- `pretrain`: `atcache pretrain`
- `pack`: `atcache pack`
- `demo`: `atcache demo`
- `fields`: click options made from the fields of a config
- `paths`: the click types of paths, which expand `~`
- `tables`: tables of layers x heads, as text
- `options`: options that several commands share
- `defaults`: defaults for options, from a TOML file
- `sweep`: the file that lists the students of a sweep
- `typed`: refuse words that would be dropped or misread
"""
