// Sets the stored theme. Not a module, so that it runs before the first paint and a dark page does not flash.
"use strict";
try {
  const theme = localStorage.getItem("ktx.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // no storage: the system's theme
}
