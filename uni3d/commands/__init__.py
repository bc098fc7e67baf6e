"""The commands of `uni3d`: each reads its flags, calls a program and writes the result."""
