"""From a file of instructions to token sequences with a loss mask.

The path, each step a module of its own:

1. `sources`: which file (or hub data set) is meant, what format it has, how it is opened;
2. `entries`: one parsed but unchecked entry after the other, with its location;
3. `fields`: an entry becomes a `Record`, by the field names of the known data sets;
4. `reading`: `read_records` ties these together and counts what it had to leave out;
5. `templates`: a record becomes text segments, some of which carry loss;
6. `tokens`: `tokenize` makes `Example`s of at most `max_length` tokens, and reports cuts;
7. `batches`: `collate` pads examples into tensors. It alone needs torch.

Nothing here executes anything that came with the data.
"""
