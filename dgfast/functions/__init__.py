"""Functions of users, which take a gradient inside: as functions of tensors in a row, judged pure, tried on other inputs."""
