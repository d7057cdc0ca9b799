// Package test runs the built program, speaks HTTP to it, and looks into the stores behind it.
package test

import (
	"testing"

	"goods/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }
