#!/bin/sh
# g++ with AddressSanitizer and UBSan: the compiler of `make sanitize`
exec g++ "$@" -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -O1
