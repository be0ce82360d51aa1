#pragma once

namespace async_device {

/// Puts the device under torch's PrivateUse1: its guard, its allocator and its hooks. Once a process.
void register_device();

void register_guard();
void register_hooks();

}  // namespace async_device
