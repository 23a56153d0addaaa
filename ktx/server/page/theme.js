// Sets the stored theme before the first paint, so that a dark page does not flash. The only script that is not a module.
"use strict";
{
  let theme = "";
  try {
    theme = localStorage.getItem("ktx.theme") ?? "";
  } catch {
    theme = ""; // no storage
  }
  if (theme) document.documentElement.dataset.theme = theme;
}
