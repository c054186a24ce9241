"""The load generator and its reports: `dynamo-serve bench`, `replay`, what `simulate` prints."""
