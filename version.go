package main

import "runtime/debug"

// buildVersion returns what the go command recorded when it built this program: its version, such as
// v1.2.3, and the commit. On a commit without a tag the version is a pseudo-version, and it ends in +dirty
// if files were changed. Outside a git clone, and with -buildvcs=false, the two are "(devel)" and
// "unknown".
func buildVersion() (version, revision string) {
	version, revision = "(devel)", "unknown"
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return version, revision
	}
	version = info.Main.Version
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			revision = setting.Value
		}
	}
	return version, revision
}
