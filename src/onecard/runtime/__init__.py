"""Running a model: requests, sampling, chat."""
